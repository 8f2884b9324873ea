"""A tokenizer that reads numbers, so that a test can say which ids a text has."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def number_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """The ids 3 to `size` - 1 are the words "3" to `size` - 1; other words are 0, BOS is 1 and EOS 2."""
    special = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary = special | {str(number): number for number in range(len(special), size)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
