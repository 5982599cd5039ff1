"""Published model shapes by name.

In: the name of a preset. Out: the fields of the model section that it fills where they are unset.
"""

from typing import Any

# Touvron et al. 2023, "Llama 2" (arXiv 2307.09288), and the released parameter files.
PRESETS: dict[str, dict[str, Any]] = {
    "llama2-7b": {
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 11008,
        "num_attention_heads": 32,
        "num_query_groups": 32,
        "max_position_embeddings": 4096,
    },
    "llama2-13b": {
        "num_layers": 40,
        "hidden_size": 5120,
        "ffn_hidden_size": 13824,
        "num_attention_heads": 40,
        "num_query_groups": 40,
        "max_position_embeddings": 4096,
    },
    "llama2-70b": {
        "num_layers": 80,
        "hidden_size": 8192,
        "ffn_hidden_size": 28672,
        "num_attention_heads": 64,
        "num_query_groups": 8,
        "max_position_embeddings": 4096,
    },
    # Small enough for a CPU, and grouped queries so that every code path of the large ones runs.
    "tiny": {
        "num_layers": 4,
        "hidden_size": 256,
        "ffn_hidden_size": 688,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "max_position_embeddings": 2048,
    },
}
