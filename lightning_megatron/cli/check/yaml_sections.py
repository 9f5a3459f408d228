"""Cuts a run's YAML file into its sections, each of which is parsed by itself once the whole file is refused."""

from __future__ import annotations

import yaml

# A module that any run may have, in place of one that is left out.
_STAND_IN = "\nmodel: {class_path: lightning.pytorch.demos.boring_classes.BoringModel}\n"


def sections(text: str) -> dict[str, str]:
    """The file with one section alone, by the section's name; lines keep their numbers.

    Args:
        text: The YAML file; none is given of a text that is no YAML, or of one line.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return {}
    if not isinstance(root, yaml.MappingNode) or root.flow_style:
        return {}
    starts = {key.value: key.start_mark.line for key, _ in root.value}
    lines, found = text.splitlines(), {}
    for name, start in starts.items():
        end = min((other for other in starts.values() if other > start), default=len(lines))
        kept = [line if start <= number < end else "" for number, line in enumerate(lines)]
        found[name] = "\n".join(kept) + (_STAND_IN if name != "model" else "\n")
    return found
