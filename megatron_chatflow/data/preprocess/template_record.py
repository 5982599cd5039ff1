"""What the sidecar says about how chats and pairs were written down.

In: a job. Out: the sidecar's `template`, from which an export takes the template of its tokenizer.
"""

import hashlib
from typing import Any

from megatron_chatflow.corpus.templates import JINJA_TEMPLATES
from megatron_chatflow.data.preprocess.settings import PreprocessSettings


def template_record(settings: PreprocessSettings) -> dict[str, Any]:
    """`{"template": {...}}`; nothing for text.

    It has `format`, `name` and `loss`; of chats and of translations written as chats, `jinja` (the
    template's source) and its `sha256`; of pairs, `direction`, and `texts` of templates from YAML.
    """
    corpus = settings.corpus
    if corpus.format == "text":
        return {}
    record: dict[str, Any] = {"format": corpus.format, "name": corpus.chat_name}
    record["loss"] = corpus.loss
    if corpus.format == "pairs":
        pairs = corpus.pairs
        record |= {"name": pairs.template, "direction": pairs.direction}
        if pairs.texts:
            record["texts"] = [
                {"prompt": text.prompt, "response": text.response} for text in pairs.texts
            ]
            return {"template": record}
        if pairs.template == "plain":
            return {"template": {**record, "loss": "all"}}
        record["chat_template"] = corpus.chat_name
    jinja = corpus.chat_template
    source = JINJA_TEMPLATES[corpus.template] if jinja is None else jinja.source
    record |= {"jinja": source, "sha256": hashlib.sha256(source.encode()).hexdigest()}
    return {"template": record}
