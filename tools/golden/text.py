"""Record how Transformers and SentencePiece turn text into token ids, and how Transformers renders chat templates.

    python tools/golden/text.py --smollm2 FILE.gguf --minilm FOLDER      (extra `reference`; `make golden` runs it)

Written to tests/golden/text/:

    corpus.json       the texts: emoji, scripts without spaces, code, numbers, odd spaces, special tokens
    smollm2.json      ids of the GGUF's tokenizer.  Transformers forgets that this family splits digits first (the model's own
                      tokenizer.json does); the split is put back here before recording
    minilm.json       ids with [CLS] and [SEP]
    byte_level.json   a tiny vocabulary, and its ids under the splits of qwen2 (Transformers' own tokenizer class), llama 3
                      (the pattern of Transformers' tiktoken converter) and gpt2
    sentence_piece.json   a tiny BPE with byte fallback trained and encoded by SentencePiece, as a GGUF file would hold it
    templates.json    templates, conversations, and what Transformers renders
"""

import argparse
import inspect
import io
import json
import re
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
import transformers
from tokenizers import pre_tokenizers
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

ROOT = Path(__file__).resolve().parents[2]
CORPUS = (
    "",
    " ",
    "The tide is in.",
    "  Two spaces before, two after.  ",
    "It's here, they're there, WE'LL see; I'd go but you've gone.",
    "In 2024 there were  1234567 boats,\t3.14 per mile and 0x1F flags.",
    "line one\nline two\r\n\r\n\n   indented\n\ttabbed\n",
    "def f(x: int) -> list[str]:\n    return [str(i) for i in range(x) if i % 2 == 0]  # even ones\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] << 2; }",
    "Grüße aus Köln, naïve café, señor, Łódź, ﬁn",
    "木の葉が川を流れていく。水面に光る。",
    "오늘은 바람이 세다. Завтра будет тихо. غدا يوم جديد",
    "नमस्ते दुनिया, ภาษาไทยไม่มีช่องว่าง",
    "🎉 party 👩‍👩‍👧 family 🇩🇪 flag 👍🏽 skin ☂️",
    "a\u0301 combining, \u00a0nbsp, \u200bzero width, \ufeff mark, \U0001f9ff\U00020000 far planes",
    "<|im_start|>user\nhello<|im_end|>\n<|endoftext|>[CLS] [SEP] <s></s>",
    "https://example.org/path?q=1&r=%20#part user@example.org",
    '{"key": [1, 2.5e-3, null, true], "text": "a \\"quoted\\" word"}',
    "ALLCAPS CamelCase snake_case kebab-case ... !!! ???  --- ___",
    "x" * 70 + " " * 20 + "=" * 40,
)
TRAINING = (
    "The harbour wakes before the town. Boats leave in the dark and come back with the light. "
    "A keeper writes the weather into a book: wind from the west, rain at noon, calm at night. "
    "It's the same book every year, and they've never lost a page. "
    "def count(boats):\n    return sum(1 for boat in boats if boat.out)\n"
    "Numbers: 1 2 3 10 20 30 100 2024. Grüße, café, naïve. 水が流れる。Ветер с моря. "
)
CONVERSATIONS: dict[str, list[dict[str, str]]] = {
    "one turn": [{"role": "user", "content": "What is the tide doing?  \n"}],
    "system first": [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "水は？ <b>&\"'</b>"},
        {"role": "assistant", "content": "  It rises. "},
        {"role": "user", "content": "🎉 and then?"},
    ],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "tide_table",
            "description": "Times of high water, „local” & exact",
            "parameters": {"type": "object", "properties": {"port": {"type": "string"}}, "required": ["port"]},
        },
    }
]
TEMPLATES = {
    "blocks": (
        "{{ bos_token }}\n{%- for message in messages %}\n    {% if message['role'] == 'system' %}\n"
        "<<SYS>>{{ message['content'] | trim }}<</SYS>>\n    {% else %}\n[{{ message.role | upper }}] {{ message.content }}\n"
        "    {% endif %}\n{% endfor %}\n{% if add_generation_prompt %}[ASSISTANT]{% endif %}"
    ),
    "tools": (
        "{% set ns = namespace(seen=false) %}{% if tools is not none and tools %}{% for tool in tools %}{{ tool | tojson }}\n"
        "{{ tool.function | tojson(indent=2) }}\n{% endfor %}{% else %}no tools\n{% endif %}"
        "{% for message in messages %}{% if message.role == 'assistant' %}{% set ns.seen = true %}{% continue %}{% endif %}"
        "{{ loop.index0 }}:{{ message.content | tojson }}{{ eos_token }}\n{% endfor %}{{ ns.seen }}"
    ),
    "generation": (
        "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}"
        "{% endgeneration %}{% else %}<{{ message.role }}>{{ message['content'] }}{% endif %}{% endfor %}"
    ),
}


def record_smollm2(gguf: Path) -> dict[str, Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    engine = tokenizer.backend_tokenizer
    as_loaded = [engine.encode(text, add_special_tokens=False).ids for text in CORPUS]
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    parsed = [engine.encode(text, add_special_tokens=False).ids for text in CORPUS]
    engine.encode_special_tokens = True
    plain = [engine.encode(text, add_special_tokens=False).ids for text in CORPUS]
    rendered = {
        n: tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True)
        for n, c in CONVERSATIONS.items()
    }
    print(
        f"smollm2: {sum(a != b for a, b in zip(as_loaded, parsed, strict=True))} texts differ without the digit split"
    )
    decoded = [tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in parsed]
    return {"parsed": parsed, "plain": plain, "decoded": decoded, "rendered": rendered}


def record_minilm(folder: Path) -> dict[str, Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return {"ids": [tokenizer(text).input_ids for text in CORPUS]}


def record_byte_level() -> dict[str, Any]:
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([TRAINING], trainer)
    model = json.loads(trained.to_str())["model"]
    vocab, merges = model["vocab"], [tuple(m) for m in model["merges"]]
    qwen = Qwen2Tokenizer(vocab=dict(vocab), merges=list(merges)).backend_tokenizer
    qwen.encode_special_tokens = True  # its class adds <|endoftext|> to any vocabulary
    pattern = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default
    llama = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=dict(vocab), merges=list(merges), ignore_merges=True))
    llama.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    engines = {"qwen2": qwen, "llama-bpe": llama, "gpt-2": trained}
    return {
        "tokens": sorted(vocab, key=vocab.__getitem__),
        "merges": [" ".join(m) for m in merges],
        "ids": {n: [e.encode(text, add_special_tokens=False).ids for text in CORPUS] for n, e in engines.items()},
    }


def record_sentence_piece(*, prefix: bool) -> dict[str, Any]:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(re.split(r"(?<=\. )", TRAINING)),
        model_writer=written,
        model_type="bpe",
        vocab_size=440,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        control_symbols=["<|turn|>"],
        minloglevel=2,
        num_threads=1,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    ids = range(model.get_piece_size())
    kinds = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in ids]
    return {
        "tokens": [model.id_to_piece(i) for i in ids],
        "scores": [model.get_score(i) for i in ids],
        "types": kinds,
        "ids": [model.encode(text) for text in CORPUS],
        "decoded": [model.decode(model.encode(text)) for text in CORPUS],
    }


def record_templates() -> list[dict[str, Any]]:
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=engine, bos_token="<s>", eos_token="</s>")
    recorded = []
    for name, source in TEMPLATES.items():
        for conversation, messages in CONVERSATIONS.items():
            for tools in (None, TOOLS):
                rendered = tokenizer.apply_chat_template(
                    messages, tools=tools, chat_template=source, tokenize=False, add_generation_prompt=True
                )
                case = {"name": f"{name}, {conversation}", "template": source, "messages": messages}
                recorded.append({**case, "tools": tools or [], "rendered": rendered})
    return recorded


def main() -> None:
    parser = argparse.ArgumentParser(description="Record token ids and rendered templates for the tests.")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "golden" / "text")
    parser.add_argument("--smollm2", type=Path, help="path of SmolLM2-135M-Instruct.Q4_1.gguf (skipped when absent)")
    parser.add_argument("--minilm", type=Path, help="path of the all-MiniLM-L6-v2 folder (skipped when absent)")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    options.out.mkdir(parents=True, exist_ok=True)
    recorded: dict[str, Any] = {
        "corpus": CORPUS,
        "conversations": CONVERSATIONS,
        "byte_level": record_byte_level(),
        "sentence_piece": {"prefix": record_sentence_piece(prefix=True), "bare": record_sentence_piece(prefix=False)},
        "templates": record_templates(),
    }
    for name, source, record in (
        ("smollm2", options.smollm2, record_smollm2),
        ("minilm", options.minilm, record_minilm),
    ):
        if source is None or not source.exists():
            print(f"{name}: skipped, no model given (--{name})")
        else:
            recorded[name] = record(source)
    for name, value in recorded.items():
        path = options.out / f"{name}.json"
        path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
        print(f"{name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
