"""Small real tokenizers, trained on the spot: Llama's sentencepiece kind and Llama 3's byte-level kind."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from llava_core.data.tokens import save_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LLAMA_3_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)

LLAMA_3_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>{{ '\\n\\n' }}{{ message.content | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}{% endif %}"
)


def train_llama_tokenizer(
    folder: Path, corpus: Iterable[str], vocab_size: int, *, legacy: bool, byte_fallback: bool = True
) -> PreTrainedTokenizerBase:
    """Trains a sentencepiece BPE model of Llama's type and loads it as transformers' LlamaTokenizer.

    unk, bos and eos are 0, 1 and 2; the pad token is unk and padding is on the right, as in the original LLaVA. The
    folder holds `tokenizer.model` and all that transformers needs. The same corpus gives the same files.

    Args:
        vocab_size: at least 3, 256 for byte fallback, and one for each character of the corpus.
        legacy: whether `▁` is put after every special token, or only where a text starts.

    Raises:
        RuntimeError: sentencepiece cannot make `vocab_size` pieces of the corpus.
    """
    import sentencepiece
    from transformers import AutoTokenizer, LlamaTokenizer

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tokenizer.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            byte_fallback=byte_fallback,
            split_digits=True,
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    # The class builds its tokenizer from an existing tokenizer.json sooner than from tokenizer.model.
    (folder / "tokenizer.json").unlink(missing_ok=True)
    tokenizer = LlamaTokenizer.from_pretrained(
        folder, legacy=legacy, add_bos_token=True, pad_token="<unk>", padding_side="right"
    )
    save_tokenizer(tokenizer, folder)
    return AutoTokenizer.from_pretrained(folder)


def train_llama3_tokenizer(folder: Path, corpus: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE tokenizer of Llama 3's type, with its special tokens and a chat template of its form.

    BOS is put before a text by the post-processor; eos is `<|eot_id|>`, pad `<|end_of_text|>`. The same corpus gives
    the same files.

    Args:
        vocab_size: at least 256, without the special tokens, whose ids follow.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in LLAMA_3_SPECIAL_TOKENS])
    bos, end_of_text, *_, end_of_turn = LLAMA_3_SPECIAL_TOKENS
    with_bos = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), with_bos])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=end_of_turn, pad_token=end_of_text, padding_side="right"
    )
    tokenizer.chat_template = LLAMA_3_CHAT_TEMPLATE
    save_tokenizer(tokenizer, Path(folder))
    return AutoTokenizer.from_pretrained(folder)
