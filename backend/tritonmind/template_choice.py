"""Which chat template a model gets: the one that was asked for, the checkpoint's own, or the one of its name."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tritonmind.chat_template import TEMPLATE_FILE, TOOL_TEMPLATE_FILE, ChatTemplate, find_chat_template
from tritonmind.config import ModelConfig
from tritonmind.errors import ConfigError
from tritonmind.named_templates import NAMED_TEMPLATES, named_template
from tritonmind.tokenizer import Tokenizer
from tritonmind.turn_template import TurnTemplate, turn_template_from_json


class TemplateChoice(NamedTuple):
    """source: Jinja to put beside the tokenizer; None where the checkpoint's own stays, or where there is none.

    stop_token_ids: what ends an answer beside the eos tokens of the checkpoint's configuration. warnings: what should
    be said about it.
    """

    source: str | None = None
    stop_token_ids: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()

    def write(self, tokenizer_dir: Path) -> None:
        """Put the template into a folder of tokenizer files that is ours, where it comes before any other."""
        if self.source is not None:
            (tokenizer_dir / TEMPLATE_FILE).write_text(self.source, encoding="utf-8")
            (tokenizer_dir / TOOL_TEMPLATE_FILE).unlink(missing_ok=True)

    def end_tokens(self, model: ModelConfig) -> tuple[int, ...]:
        """The tokens that end an answer, those of the checkpoint's configuration first."""
        known = dict.fromkeys((*model.eos_token_ids, *self.stop_token_ids))
        return tuple(token_id for token_id in known if token_id < model.vocab_size)


def choose_template(tokenizer_dir: Path, *, model_name: str, given: str | None = None) -> TemplateChoice:
    """given: --chat-template, a file in Jinja or LMDeploy's JSON, or one of NAMED_TEMPLATES.

    Raises ConfigError for a template that is neither, or broken, naming it.
    """
    if given is not None:
        return _given(given, tokenizer_dir)
    if find_chat_template(tokenizer_dir) is not None:
        return TemplateChoice(None, _turn_ends(Tokenizer.from_dir(tokenizer_dir)))
    template = named_template(model_name)
    return TemplateChoice() if template is None else _turns(template, tokenizer_dir, model_name)


def _turn_ends(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokenizer's eos, with which templates end a turn: configurations may have the base model's alone (Yi 1.5)."""
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)


def _given(given: str, tokenizer_dir: Path) -> TemplateChoice:
    path = Path(given)
    if not path.is_file():
        template = named_template(given)
        if template is not None:
            return _turns(template, tokenizer_dir, given)
        raise ConfigError(
            f"--chat-template {given} is neither a file nor one of the names that `tritonmind list` prints: "
            f"{', '.join(NAMED_TEMPLATES)}"
        )
    if path.suffix.lower() == ".json":
        return _turns(turn_template_from_json(path, named_template), tokenizer_dir, given)
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {given} cannot be read: {error}") from None
    ChatTemplate(source, {}, where=given)
    return TemplateChoice(source, _turn_ends(Tokenizer.from_dir(tokenizer_dir)))


def _turns(template: TurnTemplate, tokenizer_dir: Path, origin: str) -> TemplateChoice:
    if template.capability == "completion":
        if find_chat_template(tokenizer_dir) is not None:
            raise ConfigError(
                f"--chat-template {origin} is for models without a form for conversations, and this checkpoint has a "
                "chat template: leave the option out; a prompt given as text is continued as it stands"
            )
        return TemplateChoice()
    tokenizer = Tokenizer.from_dir(tokenizer_dir)
    beginning = tokenizer.encode("", add_special_tokens=True)[:1]
    adds_bos = bool(beginning) and beginning[0] == tokenizer.bos_token_id
    stops, warnings = list(_turn_ends(tokenizer)), []
    for word in template.stop_words:
        token_id = tokenizer.vocabulary.token_id(word)
        if token_id is None:
            warnings.append(
                f"the chat template {origin} ends answers with {word!r}, which is no token of this tokenizer: "
                "send it as `stop` in each request"
            )
        else:
            stops.append(token_id)
    return TemplateChoice(template.jinja_source(adds_bos=adds_bos), tuple(stops), tuple(warnings))
