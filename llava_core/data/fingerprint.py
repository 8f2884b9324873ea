"""What decides which ids a text becomes, so that ids that were kept are used with nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llava_core.data.chat_template import TokenizerTemplate
from llava_core.data.conversation import Template
from llava_core.data.documents import TextTemplate
from llava_core.data.records import IMAGE_MARK

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def fingerprint(tokenizer: PreTrainedTokenizerBase, template: Template) -> dict[str, str]:
    """Each part of a tokenizer and a template that decides ids, by name: a hash, or the value itself where it is short.

    What an export adds to a tokenizer for `<image>` is left out, but for documents: in conversations that mark is never
    part of a text. So is what a tokenizer puts before a text where the template does without.
    """
    is_text = isinstance(template, TextTemplate)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    vocabulary, normalizer = model.pop("vocab"), content["normalizer"]
    added = [token for token in content["added_tokens"] if is_text or token["content"] != IMAGE_MARK]
    parts = {
        "tokenizer.vocabulary": _hash(vocabulary),
        "tokenizer.added_tokens": _hash(added),
        "tokenizer.model": _hash(model),
        "tokenizer.normalizer": _hash(normalizer if is_text else _without_image_rule(normalizer)),
        "tokenizer.pre_tokenizer": _hash(content["pre_tokenizer"]),
        "tokenizer.eos": str(tokenizer.eos_token_id),
        "tokenizer.split_special_tokens": str(tokenizer.split_special_tokens),
        "template": _hash(repr(replace(template, name="", stop=(), jinja=None, adds_bos=False))),
        "before_a_text": str(tokenizer("")["input_ids"] if template.adds_bos else []),
    }
    if isinstance(template, TokenizerTemplate):
        parts["tokenizer.chat_template"] = _hash(tokenizer.chat_template)
        written = {
            name: token for name, token in tokenizer.special_tokens_map.items() if name in str(tokenizer.chat_template)
        }
        parts |= {f"tokenizer.{name}": str(token) for name, token in written.items()}
    return parts


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """An indented line for each value that is another one now, by its dotted name; empty where none is."""
    before, after = _flat(then), _flat(now)
    keys = [*before, *(key for key in after if key not in before)]
    changed = (key for key in keys if before.get(key) != after.get(key))
    return "".join(f"\n  {key}: was {before.get(key)!r}, is {after.get(key)!r}" for key in changed)


def _without_image_rule(normalizer: Any) -> Any:
    """A normalizer without the rule by which an export starts the text after an image as training does."""
    if not isinstance(normalizer, dict) or normalizer.get("type") != "Sequence":
        return normalizer
    rules = [rule for rule in normalizer["normalizers"] if IMAGE_MARK not in json.dumps(rule.get("pattern"))]
    if len(rules) == len(normalizer["normalizers"]):
        return normalizer
    return rules[0] if len(rules) == 1 else {"type": "Sequence", "normalizers": rules} if rules else None


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {prefix + key: item}
    return found


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
