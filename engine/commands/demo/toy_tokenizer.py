"""A small tokenizer of our own, in ChatGLM3's form, trained in a second on text made here."""

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from glm_rlhf.parallel.storage.durable_io import replace_file, replace_text

NUM_IDS = 640
"""Ids of the tiny tokenizer, its nine special tokens included; a multiple of 128."""

_NUM_SPECIALS = 9

_SENTENCES = """
你好，我是一个小小的语言模型。
你好！很高兴见到你，有什么可以帮你的吗？
请用中文回答下面的问题。
请用一句话说明为什么天是蓝色的。
今天天气很好，我们去公园走一走吧。
春天来了，花开了，小鸟在树上唱歌。
这个问题的答案是什么？
我不知道这个问题的答案，请再说一次。
谢谢你的帮助，再见。
不客气，祝你今天过得开心。
先算乘法，再算加法，最后写出答案。
小明有三个苹果，又买了两个，现在一共有几个？
他每天早上七点起床，晚上十点睡觉。
学习一门语言需要时间和耐心。
这是一段用来训练分词器的文字。
Hello! How can I help you today?
Please answer the question in one short sentence.
What is the answer to this question?
The answer is not known, so please ask again.
The sum of two numbers is the result of adding them.
First multiply, then add, and write down the answer.
Tom has three apples and buys two more. How many does he have now?
Think step by step and then give the final answer.
I am sorry, but I cannot help with that.
Thank you for your help. Have a nice day!
She reads a short story to her friends every evening.
The weather is nice today, so we walk in the park.
A language model writes one token after another.
Yes, that is right. No, that is wrong.
def add(a, b):
    return a + b
for i in range(10):
    print(i)
"""

_SUMS = (
    "{a} + {b} = {sum}",
    "{a} - {b} = {difference}",
    "{a} * {b} = {product}",
    "What is {a} plus {b}? The answer is {sum}.",
    "What is {a} minus {b}? The answer is {difference}.",
    "What is {a} times {b}? The answer is {product}.",
    "{a}加{b}等于多少？答案是{sum}。",
    "{a}减{b}等于多少？答案是{difference}。",
    "{a}乘{b}等于多少？答案是{product}。",
)


def write_tiny_tokenizer(folder: str | Path) -> Path:
    """Return the folder, with a tokenizer's files written into it, to be loaded by `load_tokenizer`.

    It has the settings of ChatGLM3's model that matter to a caller (BPE, digits split, bytes for unknown
    characters, text left as it is, a space put before every text) and loads as ChatGLM3 with 640 ids.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=training_text(),
        model_writer=model,
        model_type="bpe",
        vocab_size=NUM_IDS - _NUM_SPECIALS,
        character_coverage=1.0,
        split_digits=True,
        byte_fallback=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        num_threads=1,
        minloglevel=2,
    )
    replace_file(folder / "tokenizer.model", model.getvalue())
    config = {"name_or_path": "glm-rlhf/tiny-chatglm3", "tokenizer_class": "ChatGLMTokenizer"}
    replace_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    return folder


def training_text() -> Iterator[str]:
    """Yield the lines the tiny tokenizer is trained on: chat, code and sums, Chinese and English."""
    for line in _SENTENCES.splitlines():
        if line:
            yield from [line] * 8
    generator = random.Random(0)
    for _ in range(200):
        a, b = generator.randrange(100), generator.randrange(100)
        for form in _SUMS:
            yield form.format(a=a, b=b, sum=a + b, difference=a - b, product=a * b)
