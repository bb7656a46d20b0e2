"""The flags that say how an answer is chosen and when it ends; `generate` and `chat` share them."""

from __future__ import annotations

from typing import Annotated, Any

from paceline_cli.flags import flag

_WHEN = {"rich_help_panel": "When to stop"}
_HOW = {"rich_help_panel": "How tokens are chosen (unset: as the model's authors recommend)"}

MaxTokens = Annotated[int | None, flag("--max-tokens", "Tokens at most.", metavar="N", min=1, **_WHEN)]
Stop = Annotated[list[str] | None, flag("--stop", "Text that ends it; may be repeated.", metavar="TEXT", **_WHEN)]
StopTokenIds = Annotated[
    list[int] | None, flag("--stop-token-id", "Token id that ends it; may be repeated.", metavar="ID", **_WHEN)
]
IgnoreEos = Annotated[bool, flag("--ignore-eos", "Go on where the model would end.", **_WHEN)]
Timeout = Annotated[
    float | None, flag("--timeout", "Time for it, or a whole batch.", metavar="SECONDS", min=0.1, **_WHEN)
]

Temperature = Annotated[
    float | None, flag("--temperature", "0 takes the likeliest token.", "-t", metavar="T", min=0, max=100, **_HOW)
]
TopK = Annotated[int | None, flag("--top-k", "Keep the N likeliest tokens; 0: all.", metavar="N", min=0, **_HOW)]
TopP = Annotated[float | None, flag("--top-p", "Keep the likeliest tokens, together P.", metavar="P", max=1, **_HOW)]
MinP = Annotated[
    float | None, flag("--min-p", "Keep tokens P times as likely as the likeliest.", metavar="P", min=0, max=1, **_HOW)
]
Seed = Annotated[int | None, flag("--seed", "The same seed gives the same answer.", metavar="N", min=0, **_HOW)]


def given(**settings: Any) -> dict[str, Any]:
    """Those settings that the user gave; the others are the server's to decide."""
    return {name: value for name, value in settings.items() if value is not None and value is not False and value != []}
