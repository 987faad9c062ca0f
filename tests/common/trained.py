"""Small tokenizers of the three kinds that the model families use, trained on the spot, as model directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = [
    "The prefill worker reads the whole prompt at once, and the decode worker writes one token after another.",
    "A block holds sixteen tokens; 12345 blocks hold 197,520 of them. It's what we're paging, isn't it?",
    "Größe, naïve café, señor, Straße. Привет, мир! 你好，世界。こんにちは世界 مرحبا بالعالم 👋🏽 👨‍👩‍👧 ½ ﬁ",
    "def main() -> None:\n    for index in range(10):\n\tprint(index)\r\n\n\n  # spaces   and tabs\t\t",
    "user system assistant tool role content end of turn begin of text header id",
] * 4

CHATML = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nYou are Tandem.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
LLAMA = (
    "{{- bos_token }}\n"
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {%- set system_message = messages[0]['content']|trim %}\n"
    "    {%- set messages = messages[1:] %}\n"
    "{%- else %}\n    {%- set system_message = '' %}\n{%- endif %}\n"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + system_message + '<|eot_id|>' }}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim }}\n"
    "    {{- '<|eot_id|>' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)

_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def _special(content: str) -> AddedToken:
    return AddedToken(content, special=True, normalized=False)


def _byte_level(vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_GPT4), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def _write(directory: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def write_chatml(directory: Path) -> Path:
    """Qwen-like: byte-level, NFC, no BOS, a control token that is not special."""
    tokenizer = _byte_level(500)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens([_special("<|endoftext|>"), _special("<|im_start|>"), _special("<|im_end|>")])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None, "chat_template": CHATML}
    return _write(directory, tokenizer, config)


def write_llama(directory: Path) -> Path:
    """Llama-3-like: byte-level, BOS by post-processor, several end tokens in generation_config.json."""
    tokenizer = _byte_level(520)
    names = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eom_id", "eot_id")
    tokenizer.add_special_tokens([_special(f"<|{name}|>") for name in names])
    bos = ("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing("<|begin_of_text|> $A", "<|begin_of_text|> $A $B", [bos]),
        ]
    )
    _write(directory, tokenizer, {"bos_token": bos[0], "eos_token": "<|eot_id|>", "clean_up_tokenization_spaces": True})
    (directory / "chat_template.jinja").write_text(LLAMA)
    ends = [tokenizer.token_to_id(f"<|{name}|>") for name in ("end_of_text", "eom_id", "eot_id")]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": ends[0]}))
    return directory


def write_mistral(directory: Path, legacy: bool = False) -> Path:
    """SentencePiece-like: a mark for the space, byte fallback, BOS; `legacy` marks by normalizer as older files do."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    first = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    reserved = [*first, *(f"<0x{byte:02X}>" for byte in range(256))]
    latin = sorted({character for text in TEXT for character in text if character < "\u0250"})
    trainer = trainers.BpeTrainer(
        vocab_size=len(reserved) + 300,
        special_tokens=reserved,
        limit_alphabet=len(latin) - 20,  # so that some characters need the fallback
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in first]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [bos])
    config = {
        "bos_token": {"__type": "AddedToken", "content": "<s>", "normalized": False, "special": True},
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": MISTRAL}],
    }
    return _write(directory, tokenizer, config)


def write_words(directory: Path) -> Path:
    """None of the usual decoders: WordPiece, to exercise the general path."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[CLS]"], show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return _write(directory, tokenizer, {"unk_token": "[UNK]"})


WRITERS = {
    "chatml": write_chatml,
    "llama": write_llama,
    "mistral": write_mistral,
    "legacy": lambda directory: write_mistral(directory, legacy=True),
}
