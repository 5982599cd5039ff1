"""How a pipeline cuts the layers: stages, and the model chunks of the interleaved schedule.

In: `ModelConfig` and `ParallelConfig`. Out: the number of chunks that each stage holds. Narayanan
et al. 2021 (arXiv 2104.04473), section 2.2: stage s of p holds the chunks s, s + p, s + 2p and so
on of consecutive layers, which makes the pipeline's bubble as many times shorter.
"""

from megatron_chatflow.config.sections import ModelConfig, ParallelConfig
from megatron_chatflow.errors import UserError

_LAYERS = "parallel.num_layers_per_virtual_pipeline_stage"
_CHUNKS = "parallel.num_virtual_stages_per_pipeline_rank"


def num_model_chunks(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Chunks of layers that each pipeline stage holds; 1 is the schedule without interleaving.

    Raises:
        UserError: The layers cannot be cut so.
    """
    layers = parallel.num_layers_per_virtual_pipeline_stage
    chunks = parallel.num_virtual_stages_per_pipeline_rank
    if layers is None and chunks is None:
        return 1
    if layers is not None and chunks is not None:
        raise UserError(f"{_LAYERS} and {_CHUNKS}: both are set; leave one of them out")
    path, given = (_CHUNKS, chunks) if layers is None else (_LAYERS, layers)
    stages = parallel.pipeline_model_parallel_size
    if stages == 1:
        raise UserError(
            f"{path}: needs parallel.pipeline_model_parallel_size above 1; set that, or leave it "
            "out"
        )
    assert given is not None
    in_stage = model.num_layers // stages
    if in_stage % given:
        raise UserError(
            f"{path}: {given} does not divide the {in_stage} layers of a pipeline stage; use a "
            "divisor of that"
        )
    return given if layers is None else in_stage // given
