"""What a conversation is made of: turns with tags for media, and the pieces that a template makes of them."""

import re
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant")
MEDIA = ("image", "audio", "video")
TAG = re.compile(f"<({'|'.join(MEDIA)})>")

Messages = list[dict[str, Any]]  # of "role" and "content"; an assistant's turn with "learn": False is not learned


@dataclass(frozen=True)
class Piece:
    kind: str  # text (as it stands), control (one token), markup (text in which control tokens are read) or of MEDIA
    text: str
    learned: bool = False


def is_learned(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and message.get("learn", True)
