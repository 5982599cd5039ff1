"""Tests the removal of markup and the normalization of text."""

from examples.corpus import markdown, rst, wikitext
from examples.corpus.text import join_blocks, tidy, tidy_code, to_chinese_marks, to_half_width

RST = """\
=========
The kiln
=========

.. currentmodule:: pottery

.. _firing-clay:

Firing clay
===========

Clay that was shaped with :class:`~pottery.tools.Wheel` dries for a *whole*
**day**, see :doc:`/glazing` and :ref:`the wheel <wheel>`. Set ``**HEAT**`` to
:setting:`MAX_HEAT`. Then fire it::

    fire(clay)

.. note:: Open the door
    slowly. Use :meth:`open`.

.. code-block:: python

    kiln.open()

* one item that
  runs on
* another

===== =====
left  right
===== =====
a     b
===== =====

.. versionadded:: 2.0

    A `second shelf <https://example.org/shelf>`_ (:pep:`8`) was added [1]_.

.. [1] A footnote.
.. a comment

.. method:: Kiln.close(slowly=True)

    Closes the kiln.
"""

PLAIN = """\
The kiln

Firing clay

Clay that was shaped with Wheel dries for a whole day, see Glazing pots and the wheel. \
Set **HEAT** to MAX_HEAT.

Note: Open the door slowly. Use open().

- one item that runs on
- another

New in version 2.0. A second shelf (PEP 8) was added.

Kiln.close(slowly=True)

Closes the kiln."""


def test_rst_reads_as_prose():
    titles = rst.find_titles("/glazing", rst.parse("Glazing pots\n============\n"))
    assert join_blocks(rst.to_blocks(rst.parse(RST), titles, "/kiln")) == PLAIN


def test_rst_titles_by_path_and_label():
    assert rst.find_titles("/kiln", rst.parse(RST)) == {
        "/kiln": "The kiln",
        "firing-clay": "Firing clay",
    }
    titles = {"/topics/glazing": "Glazing", "firing-clay": "Firing clay"}
    (block,) = rst.to_blocks(
        rst.parse("See :doc:`../topics/glazing` and :ref:`Firing-Clay`."), titles, "/ref/kiln"
    )
    assert block.text == "See Glazing and Firing clay."


WIKITEXT = """\
{{Infobox river|name=Lor|length={{convert|12|km|mi}}}}
The '''Lor''' ({{IPA|loɹ}}; {{lang|xx|Lohr}}) is a [[River#Types|river]] of {{convert|12|km|mi}} in
[[Northland]].<ref name="a">Some [[book]].</ref> It is {{circa|1200}} years&nbsp;old.<!-- no -->
[[File:Lor.jpg|thumb|The [[Lor]] in [http://example.org spring]]]

== Course ==
It rises at [[Hill (Northland)|a hill]].
* left: [[Upper Lor]]
{| class="wikitable"
| a || {| nested |}
|}

== References ==
{{reflist}}
Nothing of this.
=== Books ===
Nor of this.
== Fish ==
Trout.
"""


def test_wikitext_reads_as_prose():
    assert wikitext.to_plain_text(WIKITEXT) == (
        "The Lor (Lohr) is a river of 12 km in\n\n"
        "Northland. It is c. 1200 years old.\n\n"
        "Course\n\nIt rises at a hill.\n\n- left: Upper Lor\n\nFish\n\nTrout."
    )
    assert wikitext.is_redirect("\n#REDIRECT [[Lor]]")


MARKDOWN = """\
---
hide: navigation
---
# Baking { #baking }

Knead the *dough* with **both** hands, see the [book](https://example.org/a_(b) "t"){.link}.
Then wait. For example:

```python
knead(dough)
```

!!! tip "A tip"
    Use `**fresh** yeast` &amp; <abbr title="H2O">water</abbr>.

=== "Python"

    code

1. flour
2. salt :smile:

![an oven](oven.png)

| a | b |
|---|---|
"""


def test_markdown_blocks_and_document():
    blocks = markdown.parse_blocks(MARKDOWN)
    assert [block.kind for block in blocks] == [
        "h1",
        "paragraph",
        "code",
        "paragraph",
        "paragraph",
        "code",
        "item",
        "item",
        "code",
    ]
    assert join_blocks(blocks) == (
        "Baking\n\nKnead the dough with both hands, see the book. Then wait.\n\n"
        "A tip\n\nUse **fresh** yeast & water.\n\n- flour\n- salt"
    )


def test_markdown_emphasis_between_chinese_characters():
    assert markdown.inline("应用于每个*路径操作*的依赖项 snake_case_name") == (
        "应用于每个路径操作的依赖项 snake_case_name"
    )


def test_tidy_removes_debris_and_keeps_code_apart():
    assert tidy("a\u00a0 b\ufeff\r\n\r\n\r\n\r\n  e\u0301\u200b") == "a b\n\n\u00e9"
    assert tidy_code("if a:\r\n    b  \n\n\n\nc\ufeff") == "if a:\n    b\n\nc"


def test_chinese_marks_and_widths():
    assert to_half_width("Ａ１％，（甲）") == "A1%，（甲）"
    assert to_chinese_marks("甲,乙. 丙﹐3.5,a:甲 ? 乙") == "甲，乙。丙，3.5,a:甲？乙"
