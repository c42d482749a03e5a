"""Which released model a folder holds, or one made from it: by its name, else by what its small files say."""

from __future__ import annotations

from pathlib import Path

from glmq.errors import GlmqError
from glmq.model.config import ModelConfig
from glmq.model.family import Member
from glmq.model.side_files import find_template, processor_settings


def describe_member(directory: Path, config: ModelConfig) -> str:
    """The released model, and what shows it, in one line."""
    text = config.nested["text_config"]
    assert isinstance(text, dict)
    theta, positions = text.get("rope_theta"), text.get("max_position_embeddings")
    processor = _processor(directory)
    shown = processor or "no processor class"
    facts = f"{shown}, image token {config.image_token_id}, rope_theta {theta}, {positions} positions"
    named = _named(directory, config.family.made_from)
    if named is not None:
        return f"{named}, by the folder's name ({facts})"

    def fits(member: Member) -> bool:
        return (
            member.processor in (None, processor)
            and member.image_token_id in (None, config.image_token_id)
            and member.rope_theta in (None, theta)
            and member.has_template in (None, _has_template(directory))
        )

    found = next(member for member in config.family.released if fits(member))
    return f"{found.title} or one made from it ({facts})"


def _named(directory: Path, titles: tuple[str, ...]) -> str | None:
    """The title that the folder's name, or the hub cache's name for it, holds."""
    places = [directory.resolve().name]
    if directory.resolve().parent.name == "snapshots":
        places.append(directory.resolve().parent.parent.name)
    return next((title for title in titles for place in places if title.lower() in place.lower()), None)


def _processor(directory: Path) -> str | None:
    try:
        found = processor_settings(directory)[1].get("processor_class")
    except GlmqError:
        return None
    return found if isinstance(found, str) else None


def _has_template(directory: Path) -> bool:
    try:
        return find_template(directory) is not None
    except GlmqError:
        return True  # there is one, that cannot be read
